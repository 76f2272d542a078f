"""What works on the repository itself: the list of public names, the pages of the API."""
