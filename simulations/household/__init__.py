"""The embedded task: typed requests to a household assistant, turned into function calls."""
