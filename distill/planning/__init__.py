"""What a recipe will take, before anything runs."""
