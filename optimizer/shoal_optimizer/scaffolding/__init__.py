"""The parts of `shoal task new`: readers of sources, the packed data file, the written task."""
