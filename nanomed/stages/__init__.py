"""What a stage script does around fit(): settings into a model, memory and time, answers shown."""
