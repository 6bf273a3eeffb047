"""The parts of `shoal task check`, one question a module."""
