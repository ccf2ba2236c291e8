"""Passages in the public domain: openings of old books, in English and in other languages."""

from __future__ import annotations

PROSE: tuple[str, ...] = (
    # Lewis Carroll, Alice's Adventures in Wonderland, 1865
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it. So she "
    "was considering in her own mind, as well as she could, for the hot day made her feel very sleepy and stupid, "
    "whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, "
    "when suddenly a White Rabbit with pink eyes ran close by her. There was nothing so very remarkable in that; nor "
    "did Alice think it so very much out of the way to hear the Rabbit say to itself that it would be late. The "
    "rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice "
    "had not a moment to think about stopping herself before she found herself falling down a very deep well.",
    # Herman Melville, Moby-Dick, 1851
    "Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular to "
    "interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a way I "
    "have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the "
    "mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before "
    "coffin warehouses, and bringing up the rear of every funeral I meet, then I account it high time to get to sea "
    "as soon as I can. There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by "
    "coral reefs; commerce surrounds it with her surf. Right and left, the streets take you waterward.",
    # Charles Dickens, A Tale of Two Cities, 1859; Great Expectations, 1861
    "There were a king with a large jaw and a queen with a plain face, on the throne of England; there were a king "
    "with a large jaw and a queen with a fair face, on the throne of France. In both countries it was clearer than "
    "crystal to the lords of the State preserves of loaves and fishes, that things in general were settled for ever. "
    "Ours was the marsh country, down by the river, within, as the river wound, twenty miles of the sea. My first "
    "most vivid and broad impression of the identity of things seems to me to have been gained on a memorable raw "
    "afternoon towards evening. At such a time I found out for certain that this bleak place overgrown with nettles "
    "was the churchyard, and that the low leaden line beyond was the river.",
    # L. Frank Baum, The Wonderful Wizard of Oz, 1900
    "Dorothy lived in the midst of the great Kansas prairies, with Uncle Henry, who was a farmer, and Aunt Em, who "
    "was the farmer's wife. Their house was small, for the lumber to build it had to be carried by wagon many miles. "
    "There were four walls, a floor and a roof, which made one room; and this room contained a rusty looking "
    "cookstove, a cupboard for the dishes, a table, three or four chairs, and the beds. When Dorothy stood in the "
    "doorway and looked around, she could see nothing but the great gray prairie on every side. Not a tree nor a "
    "house broke the broad sweep of flat country that reached to the edge of the sky in all directions. The sun had "
    "baked the plowed land into a gray mass, with little cracks running through it. Even the grass was not green.",
    # H. G. Wells, The War of the Worlds, 1898
    "No one would have believed in the last years of the nineteenth century that this world was being watched keenly "
    "and closely by intelligences greater than man's and yet as mortal as his own; that as men busied themselves "
    "about their various concerns they were scrutinised and studied, perhaps almost as narrowly as a man with a "
    "microscope might scrutinise the transient creatures that swarm and multiply in a drop of water. With infinite "
    "complacency men went to and fro over this globe about their little affairs, serene in their assurance of their "
    "empire over matter. No one gave a thought to the older worlds of space as sources of human danger, or thought of "
    "them only to dismiss the idea of life upon them as impossible or improbable.",
    # Henry David Thoreau, Walden, 1854
    "When I wrote the following pages, or rather the bulk of them, I lived alone, in the woods, a mile from any "
    "neighbor, in a house which I had built myself, on the shore of Walden Pond, in Concord, Massachusetts, and "
    "earned my living by the labor of my hands only. I lived there two years and two months. Near the end of March I "
    "borrowed an axe and went down to the woods by Walden Pond, nearest to where I intended to build my house, and "
    "began to cut down some tall, arrowy white pines, still in their youth, for timber. It was a pleasant hillside "
    "where I worked, covered with pine woods, through which I looked out on the pond, and a small open field in the "
    "woods where pines and hickories were springing up. The ice in the pond was not yet dissolved, though there were "
    "some open spaces.",
    # Charles Darwin, On the Origin of Species, 1859
    "When on board the ship, as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species, that mystery of mysteries, as "
    "it has been called by one of our greatest philosophers. On my return home, it occurred to me that something "
    "might perhaps be made out on this question by patiently accumulating and reflecting on all sorts of facts which "
    "could possibly have any bearing on it. After five years' work I allowed myself to speculate on the subject, and "
    "drew up some short notes.",
    # Kenneth Grahame, The Wind in the Willows, 1908
    "The Mole had been working very hard all the morning, spring-cleaning his little home. First with brooms, then "
    "with dusters; then on ladders and steps and chairs, with a brush and a pail of whitewash; till he had dust in "
    "his throat and eyes, and splashes of whitewash all over his black fur, and an aching back and weary arms. Spring "
    "was moving in the air above and in the earth below and around him, penetrating even his dark and lowly little "
    "house with its spirit of divine discontent and longing. It was small wonder, then, that he suddenly flung down "
    "his brush on the floor and bolted out of the house without even waiting to put on his coat. Something up above "
    "was calling him imperiously, and he made for the steep little tunnel which answered to the gravelled "
    "carriage-drive.",
    # Mary Shelley, Frankenstein, 1818
    "It was on a dreary night of November that I beheld the accomplishment of my toils. With an anxiety that almost "
    "amounted to agony, I collected the instruments of life around me, that I might infuse a spark of being into the "
    "lifeless thing that lay at my feet. It was already one in the morning; the rain pattered dismally against the "
    "panes, and my candle was nearly burnt out, when, by the glimmer of the half-extinguished light, I saw the dull "
    "yellow eye of the creature open; it breathed hard, and a convulsive motion agitated its limbs. I had worked hard "
    "for nearly two years, for the sole purpose of infusing life into an inanimate body. For this I had deprived "
    "myself of rest and health.",
    # Joseph Conrad, Heart of Darkness, 1899
    "The sea-reach of the Thames stretched before us like the beginning of an interminable waterway. In the offing "
    "the sea and the sky were welded together without a joint, and in the luminous space the tanned sails of the "
    "barges drifting up with the tide seemed to stand still in red clusters of canvas sharply peaked, with gleams of "
    "varnished spirits. A haze rested on the low shores that ran out to sea in vanishing flatness. The air was dark "
    "above Gravesend, and farther back still seemed condensed into a mournful gloom, brooding motionless over the "
    "biggest, and the greatest, town on earth. The Director of Companies was our captain and our host.",
    # Jack London, The Call of the Wild, 1903
    "Buck did not read the newspapers, or he would have known that trouble was brewing, not alone for himself, but "
    "for every tide-water dog, strong of muscle and with warm, long hair, from Puget Sound to San Diego. Because men, "
    "groping in the Arctic darkness, had found a yellow metal, and because steamship and transportation companies "
    "were booming the find, thousands of men were rushing into the Northland. These men wanted dogs, and the dogs "
    "they wanted were heavy dogs, with strong muscles by which to toil, and furry coats to protect them from the "
    "frost. Buck lived at a big house in the sun-kissed valley. It stood back from the road, half hidden among the "
    "trees, through which glimpses could be caught of the wide cool veranda that ran around its four sides.",
    # Robert Louis Stevenson, Treasure Island, 1883
    "I remember him as if it were yesterday, as he came plodding to the inn door, his sea-chest following behind him "
    "in a hand-barrow, a tall, strong, heavy, nut-brown man, his tarry pigtail falling over the shoulder of his "
    "soiled blue coat, his hands ragged and scarred, with black, broken nails, and the sabre cut across one cheek, a "
    "dirty, livid white. I remember him looking round the cove and whistling to himself as he did so. He was a very "
    "silent man by custom. All day he hung round the cove or upon the cliffs with a brass telescope; all evening he "
    "sat in a corner of the parlour next the fire and drank. Mostly he would not speak when spoken to, only look up "
    "sudden and fierce and blow through his nose like a fog-horn.",
)

LANGUAGES: tuple[str, ...] = (
    # Miguel de Cervantes, Don Quijote, 1605
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo de los de "
    "lanza en astillero, adarga antigua, rocín flaco y galgo corredor. Una olla de algo más vaca que carnero, "
    "salpicón las más noches, lentejas los viernes, algún palomino de añadidura los domingos, consumían las tres "
    "partes de su hacienda. Tenía en su casa una ama que pasaba de los cuarenta, y una sobrina que no llegaba a los "
    "veinte. Frisaba la edad de nuestro hidalgo con los cincuenta años; era de complexión recia, seco de carnes, "
    "enjuto de rostro, gran madrugador y amigo de la caza.",
    # René Descartes, Discours de la méthode, 1637
    "Le bon sens est la chose du monde la mieux partagée; car chacun pense en être si bien pourvu, que ceux même qui "
    "sont les plus difficiles à contenter en toute autre chose n'ont point coutume d'en désirer plus qu'ils en ont. "
    "Ce n'est pas assez d'avoir l'esprit bon, mais le principal est de l'appliquer bien. Les plus grandes âmes sont "
    "capables des plus grands vices aussi bien que des plus grandes vertus; et ceux qui ne marchent que fort "
    "lentement peuvent avancer beaucoup davantage, s'ils suivent toujours le droit chemin.",
    # Franz Kafka, Die Verwandlung, 1915
    "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett zu einem ungeheueren "
    "Ungeziefer verwandelt. Er lag auf seinem panzerartig harten Rücken und sah, wenn er den Kopf ein wenig hob, "
    "seinen gewölbten, braunen, von bogenförmigen Versteifungen geteilten Bauch. Seine vielen, im Vergleich zu seinem "
    "sonstigen Umfang kläglich dünnen Beine flimmerten ihm hilflos vor den Augen. Gregors Blick richtete sich dann "
    "zum Fenster, und das trübe Wetter machte ihn ganz melancholisch.",
    # Alessandro Manzoni, I promessi sposi, 1827
    "Quel ramo del lago di Como, che volge a mezzogiorno, tra due catene non interrotte di monti, tutto a seni e a "
    "golfi, a seconda dello sporgere e del rientrare di quelli, vien, quasi a un tratto, a ristringersi, e a prender "
    "corso e figura di fiume, tra un promontorio a destra, e un'ampia costiera dall'altra parte. La costiera, formata "
    "dal deposito di tre grossi torrenti, scende appoggiata a due monti contigui. Per una di queste stradicciole, "
    "tornava bel bello dalla passeggiata verso casa, sulla sera, don Abbondio, curato d'una delle terre.",
    # Johann Wolfgang von Goethe, Die Leiden des jungen Werthers, 1774
    "Wie froh bin ich, daß ich weg bin! Bester Freund, was ist das Herz des Menschen! Dich zu verlassen, den ich so "
    "liebe, von dem ich unzertrennlich war, und froh zu sein! Eine wunderbare Heiterkeit hat meine ganze Seele "
    "eingenommen, gleich den süßen Frühlingsmorgen, die ich mit ganzem Herzen genieße. Ich bin allein und freue mich "
    "meines Lebens in dieser Gegend, die für solche Seelen geschaffen ist wie die meine. Wenn das liebe Tal um mich "
    "dampft, und die hohe Sonne an der Oberfläche der undurchdringlichen Finsternis meines Waldes ruht.",
    # Victor Hugo, Les Misérables, 1862
    "En mil huit cent quinze, monsieur Charles Myriel était évêque de Digne. C'était un vieillard d'environ "
    "soixante-quinze ans; il occupait le siège de Digne depuis longtemps. Dans les premiers jours du mois d'octobre, "
    "une heure environ avant le coucher du soleil, un homme qui voyageait à pied entrait dans la petite ville. Les "
    "rares habitants qui se trouvaient en ce moment à leurs fenêtres ou sur le seuil de leurs maisons regardaient ce "
    "voyageur avec une sorte d'inquiétude. Il était difficile de rencontrer un passant d'un aspect plus misérable.",
    # Universal Declaration of Human Rights, 1948, in Portuguese, Dutch and Swedish
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência, "
    "devem agir uns para com os outros em espírito de fraternidade. Todo o indivíduo tem direito à vida, à liberdade "
    "e à segurança pessoal. Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd "
    "met verstand en geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen. Alla "
    "människor är födda fria och lika i värde och rättigheter. De är utrustade med förnuft och samvete.",
    # Benito Pérez Galdós, Trafalgar, 1873
    "Se me permitirá que antes de referir el gran suceso de que fui testigo, diga algunas palabras sobre mi infancia, "
    "explicando por qué extraña manera me llevaron los azares de la vida a presenciar la terrible catástrofe de "
    "nuestra marina. Al hablar de mi nacimiento, no imitaré a la mayor parte de los que cuentan hechos de su propia "
    "vida. Yo nací en Cádiz, y en el famoso barrio de la Viña. Entre las impresiones que conservo, está muy fijo en "
    "mi memoria el placer entusiasta que me causaba la vista de los barcos de guerra.",
)
