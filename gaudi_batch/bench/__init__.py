"""Measures cards with a model: `bench` compares them, `tune` finds the batch size."""
