"""Pictures of many prompts: drawn in several columns, laid out for published scorers, scored and reported."""
