"""Heads of networks for dense tasks."""
