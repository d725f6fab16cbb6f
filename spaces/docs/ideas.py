"""Each method's idea in two sentences, and its formula where it is more than a recipe, in LaTeX.

Written from the papers. The heads of the files in `spar_hf.methods` have the steps and the deviations.
"""

from __future__ import annotations

from typing import NamedTuple


class Idea(NamedTuple):
    """Two sentences, and a formula; None where the recipe is the formula."""

    text: str
    formula: str | None = None


IDEAS: dict[str, Idea] = {
    "clip": Idea(
        "CLIP as it is: each patch token leaves the last block as the class token does, by ordinary attention. "
        "Training only ever looked at the class token, so patches carry the picture as a whole more than their place."
    ),
    "maskclip": Idea(
        "In the last block no patch looks at another; each keeps its own value. "
        "The values are what the class token averages, so each of them alone is already in the text space."
    ),
    "sclip": Idea(
        "Queries are compared with queries and keys with keys, so that a patch attends most to itself and to what is "
        "like it. The two maps are added, and the rest of the block stays."
    ),
    "clearclip": Idea(
        "The noise of CLIP's label maps comes along the residual path, whose norm outweighs the attention's. "
        "The last block's residual and MLP are left out, and queries attend to queries."
    ),
    "naclip": Idea(
        "Patches that lie near each other mostly belong to one thing, so a Gaussian around each patch is added to the "
        "scores of its attention. Keys attend to keys, without residual and MLP."
    ),
    "cliptrase": Idea(
        "A few patches take up global information and draw the attention of all others. "
        "Correlating queries, keys and values each with themselves gives back the similarity of neighbours."
    ),
    "clip_surgery": Idea(
        "A second path runs beside the last blocks and collects what values attending to values give in each of them. "
        "The usual path goes on unchanged and feeds it, so that no block sees features that it was not trained on."
    ),
    "gem": Idea(
        "Self-self attention is a step of clustering: tokens move towards those that are like them. "
        "GEM takes it for queries, keys and values, over several blocks, with one step more and a temperature that "
        "follows from the picture."
    ),
    "itaclip": Idea(
        "Middle blocks know where things are better than the last one does. "
        "The attention of blocks 7, 8 and 10 is averaged into the last block's, which loses its MLP."
    ),
    "resclip": Idea(
        "The attention of middle blocks still is about space, where the last one's is the same for all patches. "
        "Part of it is mixed into a last block in which keys attend to keys."
    ),
    "resclip_feedback": Idea(
        "A first label map says which patches belong to one thing, and that knowledge goes back into the attention. "
        "The last block then runs a second time, with its scores raised within each segment.",
        r"A = \mathrm{softmax}\left(\tau \left((1 - \lambda) \frac{K K^\top}{\sqrt d} + \lambda M\right)"
        r" + G_\sigma\right)",
    ),
    "sc_clip": Idea(
        "A few outlier patches distort the attention of all, so they are found and replaced by their neighbours. "
        "The similarity of patches in middle blocks, where it is at its best, then steers the last block and averages "
        "the result.",
        r"A = \frac12 \mathrm{softmax}\left(3 (S - \bar S)\right)_{S \ge \bar S}"
        r" + \frac12 \mathrm{softmax}\left(\frac{K K^\top}{\sqrt d}\right), \qquad S = \cos(X_9, X_9)",
    ),
    "cliper": Idea(
        "What one patch tells another in the earlier blocks is added up over all of them. "
        "Balanced and cut at its mean, that sum is the last block's attention.",
        r"A \leftarrow \mathrm{rows}\left(\max\left(\frac{A + A^\top}{2} - \bar A, 0\right)\right), \qquad"
        r" A = \mathrm{balanced}\left(\sum_{b=1}^{11} A^{(b)}\right), \qquad y = A V W_o",
    ),
    "cliper_labels": Idea(
        "Every earlier block's input can go through the last block's projections and be compared with the names. "
        "The label map is made of the last of these maps, refined by attention once more, and the mean of them all.",
        r"P = \mathrm{brought\ to\ }0..1\left(A P_{12} + \frac{1}{L} \sum_{b} P_b\right), \qquad"
        r" P_b = \mathrm{softmax}(100 \cos(z_b, t))",
    ),
    "proxyclip": Idea(
        "DINO knows which patches belong to one thing, and CLIP knows what the thing is called. "
        "DINO's similarities become the attention, CLIP's values are what it averages.",
        r"A = \mathrm{softmax}\left(3 (S - 1.2\,\bar S)\right)_{S \ge 1.2 \bar S}, \qquad S = \cos(F, F),"
        r" \qquad y = A V W_o",
    ),
    "trident": Idea(
        "Windows give CLIP the size that it knows, but none of them sees the picture. "
        "Their features are spliced into one map first, with DINO's similarities, and then averaged over the whole "
        "picture by SAM's attention.",
        r"z = \mathrm{proj}\left(\mathrm{LN}(A_{\mathrm{SAM}}\, C)\right), \qquad C = \frac{1}{n}\sum_{w} A_w V_w W_o",
    ),
    "cass": Idea(
        "A thing's parts hang together in DINO's attention graph and fall apart in CLIP's. "
        "Each of CLIP's heads is joined by a head of DINO, chosen by spectrum and cut to its largest singular values.",
        r"A = \mathrm{softmax}\left(\frac{10\,d\,D + C}{10\,d + 1} + G_\sigma\right), \qquad y = A V W_o",
    ),
    "cass_text": Idea(
        "Names that mean nearly the same are pulled towards what the picture shows of them. "
        "The picture as a whole has a part in every score, so that names which do not fit it lose.",
        r"s = (1 - \gamma)\, p \cdot t' + \gamma\, g \cdot t, \qquad t' = (1 - \alpha)\, t + \alpha\, m",
    ),
    "lposs": Idea(
        "A patch's scores should be those of the patches that look like it and lie near it. "
        "All windows' patches become one graph, with DINO's similarities, and CLIP's scores are propagated over it.",
        r"\left(I - 0.95\, W\right) Z = Y, \qquad W = D^{-1/2} (A + A^\top) D^{-1/2}",
    ),
    "lposs_plus": Idea(
        "Patches are coarse, so their scores are propagated once more, over a graph of pixels. "
        "Pixels are tied to those of like colour around them, and borders follow the picture's edges.",
        r"\left(I - 0.95\, W\right) Z = Y, \qquad A_{ij} = \exp\left(-\frac{\|c_i - c_j\|}{0.01}\right)",
    ),
    "textregion": Idea(
        "A region deserves one feature of its own rather than a vote of its patches. "
        "SAM's regions say which of CLIP's last values are summed; the sum leaves the block as the class token does.",
        r"f_r = \mathrm{proj}\left(\mathrm{LN}\left(W_o \sum_{i} m_{ri} V_i\right)\right)",
    ),
    "corrclip": Idea(
        "Attention across things is what spoils CLIP's patches, so a patch may only attend within its region. "
        "How much it attends there is decided by DINO, and a class token for each region names it as a whole.",
        r"A = \mathrm{softmax}\left(4 \cos(f_i, f_j)\right)_{r_i = r_j}, \qquad"
        r" z = \mathrm{LN}(A V W_o) + \mathrm{LN}(A \bar V W_o) + \frac12 \mathrm{LN}(c_r)",
    ),
    "corrclip_v2": Idea(
        "As CorrCLIP, but the correlations come from dense features of the whole picture, made once. "
        "The output lies on a grid twice as fine as CLIP's.",
        r"A = \mathrm{softmax}\left(4 \cos(f_i, f_j)\right)_{r_i = r_j}",
    ),
    "corrclip_v2_bank": Idea(
        "What a region is can be looked up: in a bank of other pictures' regions, those that look alike are found. "
        "Half of a pixel's score comes from the CLIP features of its region's neighbours there.",
        r"s = \frac12\, s_{\mathrm{CorrCLIP\ v2}} + \frac12\, t \cdot \frac{1}{20} \sum_{e \in \mathrm{NN}(r)} f_e",
    ),
    "lavg": Idea(
        "Things can be found without words, so that is done first: normalised cuts of DINO's patches, one at a time. "
        "SCLIP then only has to name the masks.",
        r"(D - A)\, u = \lambda D u, \qquad s_{mk} = t_k \cdot \frac{1}{|m|} \sum_{i \in m} z_i",
    ),
    "car": Idea(
        "Names that are not in the picture disturb those that are, so they are struck out turn by turn. "
        "Each name proposes a mask, CLIP judges the picture prompted with it, and what is left proposes again until "
        "nothing changes.",
        r"N_{t+1} = \left\{\, k \in N_t : \mathrm{softmax}_{N_t}"
        r"\left(\cos(f(x \odot m_k), t)\right)_k > 0.6 \,\right\}",
    ),
    "pnp_ovss": Idea(
        "BLIP's cross attention, weighted by its gradient, says where each word of a caption is in the picture. "
        "The most salient patches are dropped and the rest asked again, so that whole things are found and not only "
        "their most telling parts.",
        r"M_w = \sum_{t} A_w^{(t)} \odot \max\left(\frac{\partial\, \mathrm{match}}{\partial A_w^{(t)}}, 0\right)",
    ),
    "clip_diy": Idea(
        "CLIP names whole pictures best, so it is given crops at three sizes as if they were pictures. "
        "A saliency model decides what is a thing and what is background.",
        r"s_k = s_{\mathrm{fg}} \cdot \frac13 \sum_{\mathrm{size}} \cos(f(\mathrm{crop}), t_k)",
    ),
    "reco": Idea(
        "Pictures of a name are looked up first, and what they have in common becomes its prototype. "
        "The prototype then finds the name's pixels by looks, not by language.",
        r"s = \sigma(\cos(x, p_k)) \cdot \sigma(10 \cos(z, t_k))",
    ),
    "knn_clip": Idea(
        "A vocabulary can grow without training if new classes are looked up in a bank of labelled regions. "
        "Where a region's neighbours agree, their vote is mixed with the base's probabilities.",
        r"P = w\, P_{\mathrm{ret}} + (1 - w)\, P_{\mathrm{base}} \quad \mathrm{where} \quad"
        r" \max P_{\mathrm{ret}} \ge \theta",
    ),
    "freeda": Idea(
        "A name's visual prototypes come from other pictures: what DINOv2 sees where the name is. "
        "Superpixels of a new picture are compared with them, and CLIP's view of the whole window joins in.",
        r"s_k = 0.8\, \sigma(\cos(f_{\mathrm{superpixel}}, p_k)) + 0.2 \cos(f_{\mathrm{window}}, t_k)",
    ),
    "diffsegmenter": Idea(
        "Stable Diffusion's cross attention says where in a picture it looks for a word. "
        "Its self attention says which pixels belong together and completes the word's map.",
        r"M_k = S \left(0.1\, C_{64} + 0.1\, C_{32} + 0.5\, C_{16} + 0.3\, C_{8}\right)",
    ),
    "iseg": Idea(
        "Multiplying a word's map with self attention again and again blurs it, since weak ties add up. "
        "Here the self attention is sharpened first, and the cross attention averaged over clusters of pixels.",
        r"M \leftarrow \mathrm{norm}\left(A' M\right), \quad A' = \max\left(A + e \log_{10}(2.718\, A), 0\right)",
    ),
    "maskdiffusion": Idea(
        "A diffusion model's features tell things apart, and its cross attention says which of them a word means. "
        "Each word's vector is the mean of the features where it is attended to, and pixels take the nearest one.",
        r"v_k = \frac{\sum_i M_{ki} F_i}{\sum_i M_{ki}},  \mathrm{label}(i) = \mathrm{arg\,max}_k\, F_i \cdot v_k",
    ),
    "diffcut": Idea(
        "The UNet's features are cut in two by a normalised cut, and the parts again as long as a cut is cheap. "
        "So no number of segments is chosen, and CLIP names them.",
        r"(D - A)\, y = \lambda D y, \qquad A = \cos(F, F)^{10}",
    ),
    "freeseg_diff": Idea(
        "Clusters of the UNet's queries are segments, found without a word. "
        "Each is shown to CLIP alone, the rest of the picture black, and a DenseCRF draws its outline.",
        r"k_c = \mathrm{arg\,max}_k\, \mathrm{softmax}_k\left(\cos(f(x \odot m_c), t_k)\right)",
    ),
    "cliper_sd": Idea(
        "CLIPer's maps know the names and are coarse. "
        "Stable Diffusion's self attention, head after head, carries them to the pixels that belong to them.",
        r"P \leftarrow A_1 A_2 \cdots A_h P",
    ),
    "scra": Idea(
        "In RADIO's last block tokens attend by how alike the results of their own attention are. "
        "Tokens of one thing end up close together, and the rest of the block stays.",
        r"A = \mathrm{softmax}\left(10\, u u^\top\right)_{\cos \ge 0}, \qquad u = \frac{o}{\|o\|}, \qquad"
        r" o = \mathrm{proj}\left(\mathrm{softmax}\left(\frac{Q K^\top}{\sqrt d}\right) V\right)",
    ),
    "radseg": Idea(
        "Windows of RADIO with that last block are averaged into one map of the picture. "
        "Each patch then becomes the mean of those that are like it, wherever in the picture they are.",
        r"X \leftarrow \mathrm{softmax}\left(10 (S - \bar S)\right)_{S \ge \bar S} X, \qquad S = \cos(X, X)",
    ),
}
