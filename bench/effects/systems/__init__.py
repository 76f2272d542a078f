"""Systems of routing: the arms and effects of one in each file."""
