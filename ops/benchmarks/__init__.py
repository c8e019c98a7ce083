"""Measures the operators of linvis_ops on a GPU; not part of the installed packages."""
