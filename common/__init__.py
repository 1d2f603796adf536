"""The ground floor: what every other folder may use. It knows neither images nor training."""
