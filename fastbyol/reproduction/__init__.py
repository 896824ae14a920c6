"""The paper's tables, run row by row and set beside its figures: what a row is, how it is run, its record, and the page."""
