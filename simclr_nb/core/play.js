// Three things to play with, without a framework: each function fills `root` from `data`.
(function () {
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const says = (text) => make("p", { className: "play-says", textContent: text, role: "status" });
  const shuffled = (n) => {  // Fisher and Yates
    const order = [...Array(n).keys()];
    for (let i = n - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  };
  const choice = (names, label, chosen) => {
    const select = make("select", { ariaLabel: label },
      ...names.map((name, i) => make("option", { value: i, textContent: name })));
    select.onchange = () => chosen(+select.value);
    return make("label", {}, `${label}: `, select);
  };

  // data: {levels: [{name, first: [address], second: [address]}]}; entry i of both shows one image
  function match(root, data) {
    let level = 0, order, picked, partner;
    const upper = make("div", { className: "play-row" });
    const lower = make("div", { className: "play-row" });
    const message = says("");

    const score = () => {
      const n = partner.length;
      const right = partner.filter((below, i) => order[below] === i).length;
      message.textContent = `You matched ${right} of ${n}. Guessing matches 1 of ${n} on average.`;
      partner.forEach((below, i) => {
        const kind = order[below] === i ? "right" : "wrong";
        upper.children[i].classList.add(kind);
        lower.children[below].classList.add(kind);
      });
    };
    const mark = (button, text) => { button.lastChild.textContent = text; };
    const pick = (i) => {
      picked = i;
      [...upper.children].forEach((b, k) => b.setAttribute("aria-pressed", k === i));
      message.textContent = `Now choose the other view of picture ${i + 1} in the lower row.`;
    };
    const pair = (below) => {
      if (picked === null) { message.textContent = "Choose a picture in the upper row first."; return; }
      const before = partner.indexOf(below);
      if (before >= 0) { partner[before] = null; mark(upper.children[before], ""); }
      if (partner[picked] !== null) mark(lower.children[partner[picked]], "");
      partner[picked] = below;
      mark(upper.children[picked], picked + 1);
      mark(lower.children[below], picked + 1);
      upper.children[picked].setAttribute("aria-pressed", false);
      picked = null;
      message.textContent = "";
      if (partner.every((p) => p !== null)) score();
    };
    const card = (address, name, act) => {
      const button = make("button", { type: "button", onclick: act, ariaLabel: name },
        make("img", { src: address, alt: name }), make("span"));
      return button;
    };
    const start = () => {
      const { first, second } = data.levels[level];
      order = shuffled(first.length);
      partner = first.map(() => null);
      picked = null;
      upper.replaceChildren(...first.map((a, i) => card(a, `first view ${i + 1}`, () => pick(i))));
      lower.replaceChildren(...order.map((k, i) => card(second[k], `second view ${i + 1}`, () => pair(i))));
      message.textContent = "Choose a picture in the upper row, then its other view in the lower row.";
    };
    const levels = choice(data.levels.map((l) => l.name), "Views", (i) => { level = i; start(); });
    const again = make("button", { type: "button", className: "play-go", textContent: "New game", onclick: start });
    root.replaceChildren(make("div", { className: "play-bar" }, levels, again), upper, lower, message);
    start();
  }

  // data: {temperatures: [number], names: [text], similarities: [number], shares: [[number]]}
  function temperature(root, data) {
    const bars = data.names.map((name, i) => {
      const fill = make("span", { className: "play-fill" });
      const value = make("span", { className: "play-value" });
      const label = `${name}, similarity ${data.similarities[i].toFixed(2)}`;
      return { fill, value, row: make("div", { className: "play-bars" },
        make("span", { textContent: label }), make("span", { className: "play-track" }, fill), value) };
    });
    const message = says("");
    const slider = make("input", { type: "range", min: 0, max: data.temperatures.length - 1,
                                   ariaLabel: "temperature" });
    const show = () => {
      const shares = data.shares[slider.value];
      bars.forEach(({ fill, value }, i) => {
        fill.style.width = `${100 * shares[i]}%`;
        value.textContent = `${(100 * shares[i]).toFixed(1)}%`;
      });
      const tau = data.temperatures[slider.value].toFixed(2);
      slider.setAttribute("aria-valuetext", tau);
      message.textContent = `Temperature ${tau}: the hardest negative has ${(100 * Math.max(...shares)).toFixed(0)}% of the push.`;
    };
    slider.oninput = show;
    slider.value = data.start;
    root.replaceChildren(make("label", { className: "play-bar" }, "Temperature ", slider),
                         ...bars.map((bar) => bar.row), message);
    show();
  }

  // data: {photo, draws: [{kind, boxes: [[x, y, width, height]], looks: [{name, views: [address], histograms: [[number]]}]}]}
  function crops(root, data) {
    const colors = ["#0072B2", "#D55E00"];
    let at = 0, look = 0;
    const svg = (tag, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
      return element;
    };
    const frame = svg("svg", { viewBox: "0 0 1 1", class: "play-frame", "aria-hidden": true });
    const photo = make("div", { className: "play-photo" }, make("img", { src: data.photo, alt: "the photo" }), frame);
    const views = make("div", { className: "play-views" });
    const message = says("");
    const histogram = (shares, color) => {
      const drawing = svg("svg", { viewBox: `0 0 ${shares.length} 1`, class: "play-histogram",
                                   preserveAspectRatio: "none", role: "img", "aria-label": "histogram of intensities" });
      const most = Math.max(...shares);
      drawing.append(...shares.map((share, i) => svg("rect",
        { x: i, y: 1 - share / most, width: 0.9, height: share / most, fill: color })));
      return drawing;
    };
    const show = () => {
      const draw = data.draws[at], shown = draw.looks[look];
      frame.replaceChildren(...draw.boxes.map(([x, y, width, height], i) => svg("rect",
        { x, y, width, height, fill: "none", stroke: colors[i], "stroke-width": 0.012 })));
      views.replaceChildren(...shown.views.map((address, i) => make("figure", {},
        make("img", { src: address, alt: `view ${i + 1}` }), histogram(shown.histograms[i], colors[i]))));
      message.textContent = `Draw ${at + 1} of ${data.draws.length}: ${draw.kind}.`;
    };
    const next = make("button", { type: "button", className: "play-go", textContent: "Draw again",
      onclick: () => { at = (at + 1) % data.draws.length; show(); } });
    const looks = choice(data.draws[0].looks.map((l) => l.name), "Colours", (i) => { look = i; show(); });
    root.replaceChildren(make("div", { className: "play-bar" }, looks, next),
                         make("div", { className: "play-pair" }, photo, views), message);
    show();
  }
  return { match, temperature, crops };
})()
