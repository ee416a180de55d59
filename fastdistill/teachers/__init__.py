"""Teachers: in this process, cached on disk, or behind HTTP."""
