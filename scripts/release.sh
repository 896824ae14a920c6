#!/usr/bin/env bash
# Builds sdist and wheel into dist/ and checks them. It uploads nothing: the last line is the command that does.
#   bash scripts/release.sh --dry_run     builds and checks, whatever CHANGELOG.md and git say
#   bash scripts/release.sh               also wants the version in CHANGELOG.md's newest heading and a clean, tagged checkout
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-dist}

say() { printf 'release: %s\n' "$*"; }
fail() { say "error: $*" >&2; exit 2; }

case "${1:-}" in '' | --dry_run) ;; *) fail "$1: no such option; --dry_run is the only one" ;; esac
"$PYTHON" -c 'import build, twine' 2>/dev/null || fail "build and twine are not installed in the environment of $PYTHON; pip install '.[release]'"
version=$("$PYTHON" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
if [ "${1:-}" != --dry_run ]; then
  heading=$(grep -m 1 '^## ' CHANGELOG.md)
  [[ "$heading" =~ ^"## $version - "[0-9]{4}-[0-9]{2}-[0-9]{2}$ ]] || fail "CHANGELOG.md begins with '$heading'; it must be '## $version - YYYY-MM-DD'"
  [ -z "$(git status --porcelain)" ] || fail "the checkout has uncommitted changes; commit them"
  [ "$(git describe --tags --exact-match 2>/dev/null)" = "v$version" ] || fail "this commit is not tagged v$version; git tag v$version"
fi
rm -rf "$OUT"
say "building fastbyol $version"
"$PYTHON" -m build --outdir "$OUT" . >"${TMPDIR:-/tmp}/fastbyol-build.log" 2>&1 || { tail -5 "${TMPDIR:-/tmp}/fastbyol-build.log"; fail "python -m build failed"; }
"$PYTHON" -m twine check --strict "$OUT"/*
"$PYTHON" scripts/distribution_check.py "$OUT"
say "$(cd "$OUT" && sha256sum ./*)"
say "next: $PYTHON -m twine upload $OUT/*"
