"""The verdict on a run in words: better than its baselines or not, by how much beyond the noise, and what to try first if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastbyol.evaluation.advice import RunFacts, first_ideas
from fastbyol.evaluation.comparison import Comparison
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, Result

PROTOCOL_TITLES = {"linear": "linear", "knn": "kNN", "labelfree": "finding other views"}
BASELINES = {"untrained": "the untrained encoder", "pca": "raw pixels (PCA)"}
OUTCOMES = {"worse": "worse than", "same": "no better than", "better": "better than"}
FEWEST_RANKED = 32
"""Fewest images whose RankMe is judged."""
COLLAPSED_RANK = 2.0
"""A RankMe below this is mentioned. It is not compared with an untrained encoder's: runs that learnt well had a third of that."""


@dataclass(frozen=True)
class Verdict:
    """headline: the outcome in one sentence. details: a sentence for each protocol. ideas: what to try first; none if it is better."""

    headline: str
    details: list[str]
    ideas: list[str]

    def lines(self) -> list[str]:
        """Returns the verdict as lines for the terminal and the results' file."""
        ideas = [f"  {number}. {idea}" for number, idea in enumerate(self.ideas, start=1)]
        return [f"verdict: {self.headline}", *(f"  {detail}" for detail in self.details), *(["try first:", *ideas] if ideas else [])]


def verdict_on(results: Sequence[Result], facts: RunFacts) -> Verdict:
    """Returns the verdict of these results of one run on one data set. With labels, the accuracies decide; without, finding other views."""
    scored = [result for result in results if isinstance(result, ProtocolResult) and result.comparisons]
    deciding: list[Result] = [*scored] or [result for result in results if result.comparisons]
    outcomes: dict[str, dict[str, list[str]]] = {"worse": {}, "same": {}, "better": {}}
    for result in deciding:
        for name, comparison in result.comparisons.items():
            outcomes[comparison.outcome].setdefault(BASELINES.get(name, name), []).append(PROTOCOL_TITLES[result.protocol])
    good = not outcomes["worse"] and not outcomes["same"]
    headline = ", ".join(
        f"{OUTCOMES[outcome]} {baseline} in {' and '.join(protocols)}"
        for outcome, baselines in outcomes.items()
        for baseline, protocols in baselines.items()
    )
    if not scored:
        headline += "; without labels there is no accuracy, and whether this helps a task is not known"
    details = [_detail(result) for result in results if result.comparisons]
    details += [word for result in results if isinstance(result, LabelFreeResult) and (word := _rank_word(result))]
    return Verdict(headline, details, [] if good else first_ideas(facts))


def _detail(result: Result) -> str:
    num = result.num_val if isinstance(result, ProtocolResult) else result.num_pairs
    what = "val images" if isinstance(result, ProtocolResult) else "images"
    parts = [difference_text(comparison, BASELINES.get(name, name)) for name, comparison in result.comparisons.items()]
    return f"{PROTOCOL_TITLES[result.protocol]}: {', '.join(parts)}; 95 % intervals of {num:,} {what}"


def difference_text(comparison: Comparison, baseline: str) -> str:
    """Returns 'better than raw pixels by 3.1 points (1.2 to 5.0)'."""
    points, low, high = (100 * value for value in (comparison.difference, comparison.low, comparison.high))
    if comparison.outcome == "same":
        return f"no better or worse than {baseline} beyond the noise ({points:+.1f} points, {low:+.1f} to {high:+.1f})"
    low, high = (low, high) if points > 0 else (-high, -low)
    return f"{OUTCOMES[comparison.outcome]} {baseline} by {abs(points):.1f} points ({low:.1f} to {high:.1f})"


def _rank_word(result: LabelFreeResult) -> str:
    rank = result.measures["byol"]["rankme"]
    # RankMe is at most the number of images, so that of a few says nothing.
    if rank >= COLLAPSED_RANK or result.num_images < FEWEST_RANKED:
        return ""
    return f"RankMe is {rank:.2f}: the features of all images lie along one line, a collapse"
