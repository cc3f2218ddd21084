// Values of single tokens, laid over the picture and the text of a sample. The pointer or the keyboard chooses a token.
{
  const make = (parent, name, properties = {}) => Object.assign(parent.appendChild(document.createElement(name)), properties);
  // Bytes are 128 + 127 sign(v) sqrt(|v| / largest): small values keep their digits.
  const decoded = ({ bytes, largest }) => {
    const codes = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
    return (index) => {
      const x = (codes[index] - 128) / 127;
      return Math.sign(x) * x * x * largest;
    };
  };
  const number = (value) => String(Number(value.toPrecision(3)));
  const colour = (value, largest) => {
    const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
    return `rgba(${value < 0 ? "42, 136, 201" : "213, 94, 0"}, ${share.toFixed(3)})`;
  };
  const visible = (word) => word.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";
  const labelled = (parent, text) => make(parent, "label", { textContent: `${text} ` });

  for (const holder of document.querySelectorAll(".tokens")) {
    const { value, series, samples } = JSON.parse(holder.querySelector("script").textContent);
    const controls = make(holder, "div", { className: "controls" });
    const choice = make(labelled(controls, "sample"), "select");
    samples.forEach(({ id }, index) => choice.add(new Option(id, index)));
    const layer = make(labelled(controls, "layer"), "input", { type: "range", min: 0, max: samples[0].layers - 1 });
    layer.value = layer.max;
    const layerText = make(controls, "output");
    const one = make(labelled(controls, "of"), "select");
    series.forEach((name, index) => one.add(new Option(name, index)));
    const opacity = make(labelled(controls, "opacity"), "input", { type: "range", min: 0, max: 100, value: 80 });
    const said = make(holder, "p", { className: "said" });
    const body = make(holder, "div", { className: "overlay" });
    const pictures = make(body, "div"), text = make(body, "div", { className: "text" });

    let sample, at, chosen, marks;
    const look = (layerOf, of, query, token) => {
      const count = sample.tokens.length;
      if (!sample.queries) return at((layerOf * series.length + of) * count + token);
      return at(((layerOf * series.length + of) * sample.queries.length + query) * count + token);
    };
    // Whether the chosen token attends to others; a visual token does not, it is what is attended to.
    const query = () => (sample.queries ? sample.queries.indexOf(chosen) : -1);
    const valueOf = (token) => {
      const [of, deep] = [Number(one.value), Number(layer.value)];
      if (!sample.queries) return look(deep, of, 0, token);
      if (query() >= 0) return look(deep, of, query(), token);
      const from = sample.queries.indexOf(token);
      return from < 0 ? null : look(deep, of, from, chosen);
    };
    const paint = () => {
      const found = sample.tokens.map((_, token) => valueOf(token));
      const largest = (places) => Math.max(0, ...found.filter((v, token) => v !== null && places === (sample.places[token] !== null)).map(Math.abs));
      const most = [largest(false), largest(true)]; // of the text, of the picture
      marks.forEach((mark, token) => {
        const isPlace = sample.places[token] !== null;
        const share = isPlace ? Number(opacity.value) / 100 : 0.75;
        mark.style.backgroundColor = found[token] === null ? "transparent" : colour(found[token] * share, most[Number(isPlace)]);
        mark.setAttribute("aria-pressed", String(token === chosen));
        mark.title = found[token] === null ? "" : `${value} ${number(found[token])}`;
      });
      layerText.textContent = layer.value;
      const name = sample.places[chosen] ? `row ${sample.places[chosen][1]}, column ${sample.places[chosen][2]}` : `“${visible(sample.tokens[chosen])}”`;
      const what = !sample.queries ? "" : query() >= 0 ? `from ${name}` : `to ${name}, from the text`;
      said.textContent = `${[value, what].filter(Boolean).join(" ")}; full colour is ${number(most[1])} on the picture and ${number(most[0])} in the text`;
    };
    const choose = (token) => {
      chosen = token;
      paint();
    };
    const mark = (parent, token, label) => {
      const button = make(parent, "button", { type: "button" });
      button.setAttribute("aria-label", label);
      button.addEventListener("pointerenter", () => choose(token));
      button.addEventListener("focus", () => choose(token));
      marks[token] = button;
      return button;
    };
    // Of values that belong to no pair of tokens, the layer with the largest is shown first.
    const strongest = () => {
      const size = series.length * sample.tokens.length;
      const most = Array.from({ length: sample.layers }, (_, deep) =>
        Math.max(...Array.from({ length: size }, (_, index) => Math.abs(at(deep * size + index)))));
      return most.indexOf(Math.max(...most));
    };
    const show = () => {
      sample = samples[choice.value];
      at = decoded(sample);
      if (!sample.queries) layer.value = strongest();
      marks = [];
      pictures.replaceChildren();
      text.replaceChildren();
      sample.grids.forEach(([rows, columns], picture) => {
        const frame = make(pictures, "div", { className: "frame" });
        const image = make(frame, "img", { alt: `picture of ${sample.id}, as the model saw it` });
        if (sample.pictures[picture]) image.src = sample.pictures[picture];
        const grid = make(frame, "div", { className: "grid" });
        grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
        sample.places.forEach((place, token) => {
          if (place?.[0] !== picture) return;
          const cell = mark(grid, token, `row ${place[1]}, column ${place[2]}`);
          cell.style.gridArea = `${place[1] + 1} / ${place[2] + 1}`;
        });
      });
      sample.tokens.forEach((word, token) => {
        if (sample.places[token] === null) mark(text, token, visible(word)).textContent = visible(word);
      });
      choose(sample.queries ? sample.queries.at(-1) : sample.tokens.length - 1);
    };
    choice.addEventListener("change", show);
    for (const control of [layer, one, opacity]) control.addEventListener("input", paint);
    show();
  }
}

