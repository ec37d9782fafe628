"""The live run page: read-only, server-rendered, offline; it knows a run by the files of its folder alone."""
