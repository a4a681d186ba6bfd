"""From published speech corpora to instruction data, as DIFFA's paper makes it."""
