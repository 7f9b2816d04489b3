"""The method's first experiments from one recipe, over seeds."""
