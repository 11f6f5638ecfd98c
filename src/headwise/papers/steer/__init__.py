"""Steering and editing what trained models do."""
