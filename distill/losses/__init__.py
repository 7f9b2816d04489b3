"""Rewards, divergences, the objective, LM heads in chunks, what teachers say."""
