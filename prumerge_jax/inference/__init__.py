"""From images and prompts to answers and scores."""
