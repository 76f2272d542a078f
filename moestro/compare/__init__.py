"""Equal-compute experiments: match the arms, run them, judge them, show the result."""
