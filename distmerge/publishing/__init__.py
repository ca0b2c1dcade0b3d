"""From OUT to a repository on the Hub, at the end of a merge or while it goes on."""
