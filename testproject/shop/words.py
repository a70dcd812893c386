"""Words that the made-up authors, titles and customers of the demo are put together from."""

from __future__ import annotations

FIRST_NAMES = """
    Ada Amara Anselm Beatrix Bruno Cecilia Clara Cosimo Dagny Daniel Edith Elias Emeka Esther
    Felix Freya Gabriel Greta Hana Henrik Ines Ivo Jamila Jonas Judith Kaito Karin Lena Leopold
    Linnea Lucas Mara Matteo Milena Nadia Nils Noor Olga Oscar Paloma Pavel Petra Quentin Rosa
    Ruben Saskia Selma Stefan Tamsin Theo Ulrike Vera Viktor Wanda Xavier Yara Yusuf Zelda
""".split()

LAST_NAMES = """
    Abara Albrecht Ardent Bergström Bianchi Blackwood Castellan Chandra Corbin Dalgaard
    Delacroix Dreyer Ekholm Fairweather Farrow Ferreira Galloway Grimaldi Hale Hargrove Holm
    Ibarra Ivanova Jansen Kaplan Kessler Kowalski Lindqvist Lowell Marchetti Marlowe Mendoza
    Moreau Nakagawa Novak Okafor Olivier Pemberton Petrov Quist Rahman Ravel Rosenthal Sandoval
    Sato Severin Silva Sorensen Tanaka Thorne Ueda Valdez Vance Winterbourne Wolff Yilmaz Young
    Zander
""".split()

ADJECTIVES = """
    Amber Brittle Broken Burning Crooked Distant Drowned Empty Forgotten Frozen Gentle Gilded
    Hidden Hollow Honest Invisible Last Little Lonely Long Lost Narrow Northern Painted Patient
    Quiet Restless Salt Scarlet Second Secret Silent Sleeping Slow Small Stolen Unfinished
    Wandering White Winter
""".split()

NOUNS = """
    Almanac Archive Atlas Bell Bridge Cartographer Clockmaker Cottage Crossing Daughter
    Dictionary Engine Ferry Garden Gardener Harbour Hour House Island Kingdom Lantern Letter
    Library Lighthouse Map Mirror Museum Observatory Orchard Organist Passenger Piano River Road
    Room Season Ship Stair Station Theatre Tide Tower Train Translator Valley Violin Winter
    Witness
""".split()

PLACES = """
    Antwerp Bergen Bilbao Cádiz Cork Dresden Dubrovnik Galway Ghent Gdansk Kyoto Leith Lisbon
    Lucca Malmö Marseille Naples Odessa Oporto Riga Rouen Siena Tallinn Trieste Tromsø Utrecht
    Valparaíso Vilnius York Zadar
""".split()

TITLES = (
    "The {adjective} {noun}",
    "The {noun} of {place}",
    "The {noun} and the {noun2}",
    "A {adjective} {noun} in {place}",
    "{adjective} {noun}",
    "Letters from {place}",
    "The {adjective} {noun} of {place}",
    "What the {noun} Knew",
)

ABOUT = (
    "A {adjective} summer in {place}, a {noun} nobody wants to talk about, and two sisters who remember it differently.",
    "When the last {noun} in {place} closes, a retired teacher begins to write down what she saw there.",
    "The story of a {noun}, told over one night by the three people who could have saved it.",
    "Part travel book, part memoir: on foot from {place} to the sea, in search of a {adjective} {noun}.",
    "A clerk in {place} finds his own name in a {adjective} {noun}, ninety years before his birth.",
    "Short, funny and {adjective}: the diary of a family that inherits a {noun} and cannot agree on anything.",
)

NOTES = (
    "",
    "",
    "",
    "",
    "",
    "a present, please wrap it",
    "leave it with the neighbours",
    "no hurry",
)
