"""The programs: `prumerge-train`, `prumerge-eval`, `prumerge-convert`, `prumerge-visualize`."""
