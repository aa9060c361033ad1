"""The decisions of a run. Pure: neither Ray nor storage nor a clock."""
