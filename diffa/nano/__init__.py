"""What only the nano models need: their corpus, auxiliary losses, benchmark and demo."""
