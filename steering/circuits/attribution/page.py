def graph_html(content, path):
    return ""
