"""Files that nobody means well with: what reads them accepts, or says in one line why not."""
