"""The contract between controller, optimizer and agents: messages, bundle format, signatures.

Imported by every other package and imports none of them.
"""

__version__ = "0.1.0"
