"""The decoder, its attention, and the pooled towers."""
