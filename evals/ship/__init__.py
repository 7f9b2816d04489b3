"""`pocketvlm report`: the page that decides whether to ship, and the comparison of two."""
