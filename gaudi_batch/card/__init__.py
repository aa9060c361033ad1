"""The process beside a device."""
