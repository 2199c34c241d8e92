"""What has to do with other people: the Hub, licences, model cards, provenance."""
