"""A feature as HTML: feature.py is the page, contexts.py its lines of text, charts.py its histograms, assets.py the style."""
