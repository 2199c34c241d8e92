"""Searching a recipe's [int8] section: groups of layers, candidates, halving, the frontier, the written recipe."""
