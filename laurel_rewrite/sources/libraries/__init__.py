"""Packages of architectures, a file each: MODEL is the file's name, a colon and the name of an architecture.

A file has PACKAGE, what must be installed, and `make(name, settings, device, batch)`, which gives a `Built` in train mode.
"""
