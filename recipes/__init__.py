"""Recipes: how the models that headwise ships were made."""
