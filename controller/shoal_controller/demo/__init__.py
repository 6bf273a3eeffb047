"""The demo: the whole story on this machine, told with public commands and APIs only."""
