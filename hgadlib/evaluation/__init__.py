"""From level values to metrics: maps, image and pixel metrics, class inference, thresholds."""
