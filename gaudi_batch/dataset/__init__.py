"""The dataset of prompts."""
