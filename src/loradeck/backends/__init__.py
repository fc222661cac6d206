"""Where a store's versions lie: a folder, or a place elsewhere with a cache here.

`AdapterStore` resolves names and versions; a backend lists, reads, publishes and removes them.
"""
