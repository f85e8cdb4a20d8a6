"""No tasks of our own: lmms-eval asks every plug-in for this folder."""
