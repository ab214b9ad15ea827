"""Taking a trained model away: functions that are served without this package, and the card that goes with them."""
