"""What an evaluation shows: tables, charts, overlays, one HTML file."""
