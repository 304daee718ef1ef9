"""Files: written whole or not at all, read with errors in one sentence. Imports nothing else of this package."""
