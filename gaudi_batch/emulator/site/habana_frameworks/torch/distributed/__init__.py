"""Work on several devices at once, which is not emulated."""
