"""From a budget to a smaller model: candidates, prices, the measured curve."""
