"""Which clip comes when: keyed draws, endless orders, rounds, the loader."""
