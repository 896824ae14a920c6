"""What others do for the same work, to be measured beside ours."""
