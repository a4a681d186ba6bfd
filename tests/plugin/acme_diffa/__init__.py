"""Parts for diffa by Acme."""
